"""What an engine keeps in memory: KV slots, encoded images, prefixes of prompts."""

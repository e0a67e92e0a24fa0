"""The OpenAI-shaped HTTP edge."""

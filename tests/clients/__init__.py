"""The endpoint as client libraries use it, unmodified and in an environment of their own: `make
test-clients`."""

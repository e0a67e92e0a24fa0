"""Model replicas behind Ray Serve: engine, application, attaching to it, and HTTP."""

"""A policy behind the OpenAI protocol: requests, replies over the engine, the application, the page."""

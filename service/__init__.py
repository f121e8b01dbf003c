"""The service: OpenAI's protocol in front of engine/. The only room that knows HTTP; it knows no torch."""

"""The inference appliance: an OpenAI-compatible LLM server built around its measurements."""

__version__ = "0.1.0"

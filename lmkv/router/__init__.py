"""The OpenAI-compatible router: one request goes to a prefill and a decode engine at the same moment."""

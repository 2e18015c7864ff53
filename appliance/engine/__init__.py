"""The engine: scheduler, paged KV, model runner, and the client through which the server reaches them. Importing it loads no torch."""

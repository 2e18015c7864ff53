"""The server's side of text: tokenizer, chat template, incremental detokenizer. Torch-free."""

"""Images on disk, and the codes that a tokenizer makes of them."""

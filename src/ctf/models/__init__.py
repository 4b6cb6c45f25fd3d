"""The method: tokenizer, clusters, the coarse and the fine transformer, and sampling from them."""

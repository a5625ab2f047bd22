"""`qwenlora convert-qwen1`: first-generation Qwens in Qwen2's architecture."""

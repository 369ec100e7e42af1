"""The data scripts. This file makes `from data.tokenizer import load_tokenizer` work for evaluate.py."""

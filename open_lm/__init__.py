"""OpenLM: preprocess text, and train and evaluate language models."""

"""OpenLM: raw text in, an evaluated and openly released language model out."""

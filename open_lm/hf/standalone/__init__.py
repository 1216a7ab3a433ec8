"""Source files of model_type openlm, which need torch and transformers only; an export copies them."""

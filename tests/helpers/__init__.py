"""What several test files need: tiny models, prompts, slow twins, and processes to start."""

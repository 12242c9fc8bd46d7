"""How near the student is to the teacher on prompts that it has not been trained on."""

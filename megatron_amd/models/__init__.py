"""Student, teacher and critic as Megatron-Core models."""

"""The objectives: distances, moments, and the fused LM head that evaluates them on vocabulary shards.

Pure torch. Process groups arrive as arguments, so nothing here knows how the job is laid out.
"""

# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What `train_semantic_fill_lora.py` calls: options, data, encodings, checkpoints, publishing, precision and memory."""

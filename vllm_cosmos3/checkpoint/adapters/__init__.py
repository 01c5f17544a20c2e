"""LoRA adapters of the generator: found, read in three dialects, and merged into a checkpoint's matrices.

    W' = W + factor * B @ A, with factor = scale * alpha / rank

They are merged while weights are loaded, before these are shared among ranks, or by `merge-lora` into a
checkpoint of its own.
"""

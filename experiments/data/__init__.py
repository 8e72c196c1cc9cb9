"""From where data are to batches: sources, tokenizers, packing, images; no model, head or loss is known here."""

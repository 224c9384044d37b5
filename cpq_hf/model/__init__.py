"""One model: its settings, what is in it, which weights are quantized, and the conversions between its forms."""

"""Train: schedules, learned bit-widths, freezing, distillation."""

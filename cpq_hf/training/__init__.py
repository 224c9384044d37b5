"""What runs while a model trains: schedules, learned bit-widths, freezing, distillation."""

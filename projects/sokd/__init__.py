"""SoKD: student-oriented refinement of a teacher's features for knowledge distillation."""

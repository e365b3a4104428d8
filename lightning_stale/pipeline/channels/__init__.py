"""What moves features and gradients between the stages of two processes, or of one."""

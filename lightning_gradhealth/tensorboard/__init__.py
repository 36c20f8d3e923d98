"""The Grad Health tab of TensorBoard. Neither torch nor Lightning is imported here: TensorBoard starts as fast."""

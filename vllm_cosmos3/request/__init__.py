"""What a user asks for: fields, request, plan. No tensors, no torch."""

"""The fused ops, one file each: reference, schema, fake kernel, registration, public function."""

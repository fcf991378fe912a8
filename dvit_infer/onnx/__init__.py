"""Write graphs as ONNX files, and run them in ONNX Runtime."""

"""Leave Python: graphs written as ONNX files, and run by ONNX Runtime."""

"""Write graphs in the operators of another runtime: node kinds once, on a builder for each runtime.

The vocabulary is ONNX's default domain: names, inputs and attributes of operators mean what they mean there.
"""

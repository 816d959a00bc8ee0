"""What only a dump needs: a checked teacher, ensembles, ONNX files, numpy functions, matrices."""

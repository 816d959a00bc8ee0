"""What only a dump needs: checked teachers, ensembles, ONNX files, numpy functions and matrices."""

"""The paper's experiments, reproduced: ``python -m sparsekern.paper`` lists the commands."""

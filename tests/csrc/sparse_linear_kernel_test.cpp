// sparse_linear
int main() { return 0; }

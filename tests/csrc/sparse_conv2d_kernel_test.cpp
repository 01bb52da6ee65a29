// sparse_conv2d
int main() { return 0; }

// k_winners
int main() { return 0; }

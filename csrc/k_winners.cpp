// k_winners

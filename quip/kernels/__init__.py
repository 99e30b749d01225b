"""Operations worth a fast form: the torch reference first, the fast form under it."""

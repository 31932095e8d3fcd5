"""What people look at of an explained run: records read from its folder alone, and how a terminal shows them."""

"""Many runs that belong together: tables of them."""

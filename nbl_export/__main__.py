"""`python -m nbl_export`."""

from nbl_export.cli import main

main()

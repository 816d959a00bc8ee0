from softcache.cli import main

main()

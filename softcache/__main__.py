from softcache.cli.app import main

main()

from bench.end_to_end.compare import main

if __name__ == "__main__":
    main()

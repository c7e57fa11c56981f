from virft_fast.commands import end_process
from virft_fast.train.run import main

if __name__ == "__main__":
    end_process(main())

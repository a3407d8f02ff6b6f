"""The chatbot mixture's program under its former name; LaVIN's data is `mma.lavin.data`."""

"""The parts of the page `llava.serve.web`: a client of servers, conversations, drawings, feedback, the layout."""

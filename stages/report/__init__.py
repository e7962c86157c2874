"""`rats stage report`: one offline page of tables, figures and costs."""

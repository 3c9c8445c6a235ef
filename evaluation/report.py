def write(folder): (folder/"report.html").write_text("x")

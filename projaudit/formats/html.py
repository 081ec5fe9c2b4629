from projaudit.report import Report
def render(report: Report) -> str: return ""
